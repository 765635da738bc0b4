"""What `learned` runs in another process: `PYTHON - NAME < THIS`, in a folder with texts.json, leaves scores.json.

That Python may be an old one and knows nothing of this package.
"""

import json
import sys


def bertscore(texts, groups):
    """The F1 of every text; an empty one has 0, as the package says, which fails to encode it beside transformers 5."""
    from bert_score import BERTScorer
    from transformers import AutoTokenizer

    name, written = "roberta-large", [i for i, text in enumerate(texts) if text]
    if not written:
        return [0.0] * len(texts)
    scorer = BERTScorer(model_type=name, num_layers=17, idf=False, rescale_with_baseline=False)
    # The package asks for a space before the first word in a way that transformers 5 ignores without a word.
    scorer._tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)
    found = iter(scorer.score([texts[i] for i in written], [groups[i] for i in written])[2].tolist())
    return [next(found) if text else 0.0 for text in texts]


def bleurt(texts, groups):
    """The score of every text beside its first reference, by the checkpoint that the package ships for its tests."""
    import os

    from bleurt import score

    scorer = score.BleurtScorer(os.path.join(os.path.dirname(score.__file__), "test_checkpoint"))
    return scorer.score(references=[group[0] for group in groups], candidates=texts, batch_size=100)


def moverscore(texts, groups):
    """The score of every text beside its first reference."""
    import inspect

    from moverscore_v2 import get_idf_dict, word_mover_score

    if "1./(1." in inspect.getsource(word_mover_score):
        raise ImportError("this moverscore_v2 is not that of release 1.0.3, and has another formula")
    right = [group[0] for group in groups]
    options = {"stop_words": [], "n_gram": 1, "remove_subwords": True}
    return word_mover_score(right, texts, get_idf_dict(right), get_idf_dict(texts), **options)


if __name__ == "__main__":
    with open("texts.json") as file:
        given = json.load(file)
    made = [float(score) for score in globals()[sys.argv[1]](*given)]
    with open("scores.json", "w") as file:
        json.dump(made, file)
