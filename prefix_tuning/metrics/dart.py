"""The scores of DART, as papers on prefix tuning report them: BLEU, METEOR, TER, MoverScore, BERTScore and BLEURT.

They come from `run_eval_on_dart.sh` of github.com/Yale-LILY/dart, whose files of references are in lower case with all
punctuation apart; predictions are brought into the same form.  There are up to three references, and BLEU and BERTScore
read all of them.  The others read the first: the script makes the files of METEOR and TER from that one alone.
"""

from prefix_tuning.metrics import learned
from prefix_tuning.metrics.meteor import meteor_if_java
from prefix_tuning.metrics.webnlg import REFERENCES, count_edits, multi_bleu, spaced, ter, written


def dart(predictions: list[str], references: list[list[str]], *_: list[str] | None) -> dict[str, float | None]:
    """BLEU from 0 to 100; METEOR, TER (lower is better), MoverScore, BERTScore's F1 and BLEURT on a scale up to 1.

    None for METEOR without Java, and for what `learned` finds no package or weights of.  A `ValueError` where all
    references of a prediction are blank.
    """
    texts = [spaced(text.lower()) for text in predictions]
    groups = [[spaced(text.lower()) for text in group[:REFERENCES]] for group in written(references)]
    first = [group[:1] for group in groups]
    (meteor,) = meteor_if_java(texts, first, [range(len(texts))])
    return {
        "dart_bleu": multi_bleu(texts, groups),
        "dart_meteor": meteor,
        "dart_ter": ter([count_edits(text, group) for text, group in zip(texts, first, strict=True)]),
        "dart_moverscore": learned.moverscore(texts, first),
        "dart_bertscore": learned.bertscore(texts, groups),
        "dart_bleurt": learned.bleurt(texts, first),
    }
