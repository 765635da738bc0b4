"""Tables and figures of papers by name; a new one is data in a file here and a line in `TABLES`."""

from experiments.tables import figures, lora, prompt_tuning, ptuning_v2, smollm2, summaries, table_to_text
from experiments.tables.base import Table

TABLES: dict[str, Table] = {
    "e2e": table_to_text.e2e,
    "webnlg": table_to_text.webnlg,
    "dart": table_to_text.dart,
    "xsum": summaries.xsum,
    "xsum-extrapolation": summaries.xsum_extrapolation,
    "low-data": figures.low_data,
    "prefix-length": figures.prefix_length,
    "embedding-infix": table_to_text.embedding_infix,
    "initialisation": table_to_text.initialisation,
    "data-size": table_to_text.data_size,
    "lora-e2e": lora.lora_e2e,
    "lora-rank": lora.lora_rank,
    "prompt-length": prompt_tuning.prompt_length,
    "ptuning-v2": ptuning_v2.ptuning_v2,
    "smollm2-length": smollm2.length,
    "smollm2-low-data": smollm2.low_data,
    "smollm2-initialisation": smollm2.initialisation,
}
