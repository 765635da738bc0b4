"""A prefix in transformers alone, from what `python run.py export --workdir=DIR --format=kv --output=FOLDER` writes.

python experiments/kv_in_transformers.py MODEL FOLDER/prefix.safetensors "name : Blue Spice"
"""

import sys

import safetensors.torch
import torch
import transformers


def generate(model, file, prompts, pad, **options):
    """What a decoder writes, token ids [B N], after the prefix and each of the prompts, lists of token ids."""
    kv = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, "pt") as opened:
        first = int(opened.metadata()["first_position"])  # of the real tokens
    slots, longest = len(kv["decoder.self.0.key"]), max(map(len, prompts))
    cache, copies = transformers.DynamicCache(), (len(prompts) * options.get("num_beams", 1), 1, 1, 1)
    for layer in range(model.config.num_hidden_layers):
        k, v = (kv[f"decoder.self.{layer}.{part}"].transpose(0, 1).to(model.dtype) for part in ("key", "value"))
        cache.update(k.repeat(copies), v.repeat(copies), layer)  # [B K P H]
    # Tokens that stand for the slots, since transformers cuts off as many as the cache holds; then padding on the left.
    tokens = torch.tensor([[pad] * (slots + longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[1] * slots + [0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    positions = (mask.cumsum(1) - 1 - slots + first).clamp(min=0)
    options |= {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "pad_token_id": pad}
    return model.generate(tokens, **options)[:, slots + longest :]


if __name__ == "__main__":
    name, file, *texts = sys.argv[1:]
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(name)
    rows = generate(model, file, tokenizer(texts)["input_ids"], tokenizer.eos_token_id, max_new_tokens=60)
    print(*tokenizer.batch_decode(rows, skip_special_tokens=True), sep="\n")
