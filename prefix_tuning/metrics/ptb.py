"""The Penn Treebank tokeniser of the MS-COCO caption scorer: the Java program, or Python where the two agree.

The Java program is a lexer of some hundred rules (Stanford CoreNLP 3.4.1).  `python_tokens` imitates it on plain
English and refuses all else, so that a text either gets the Java program's tokens or no score; the tests compare the
two on E2E and WebNLG.
"""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
# What the scorer drops.  Its list has brackets too, but as "-LRB-", and they arrive as "-lrb-": they stay.
DROPPED = frozenset(ptbtokenizer.PUNCTUATIONS)
RENAMED = {"(": "-lrb-", ")": "-rrb-", '"': "''", "£": "#", "–": "--"}

# Words that keep their period whatever follows; of the others below, case or the next word decides.
ABBREVIATION = (
    "(?i:adj|adm|adv|al|ala|alex|apr|ariz|assn|assoc|asst|attys?|aug|ave|bancorp|bhd|bldg|blvd|brig|bros|calif|capt|cf|"
    "cie|cmdr|col?|colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|drs?|elec|ens|esq|est|etc|ext|feb|fla|fri|ft|ga|"
    "gen|govs?|hon|inc|ind|insp|intl|invt|jan|jos|jr|jul|jun|kans?|ky|lieut|ltd?|maj|mar|md|messrs|mich|minn|mlle|mme|"
    "mon?|mont|mrs?|ms|msgr|mt|natl|neb|nev|nov|oct|okla|penn|pfc|ph|plc|pres|profs?|pvt|rd|reps?|rev|rt|sens?|sept?|"
    r"seq|sfc|sgt|spc|sq|sr|ste?|supts?|sys|tel|tenn|thu|thurs|treas|tues?|univ|va|vs|vt|wed|wisc?|wm|wyo)\."
)
UNDECIDED = (
    r"(?i:ark|art|az|ca|del|figs?|ill|la|mass|miss|mfg|mtg|nos?|op|ore|pa|pp|pp?t[ey]s?|prop|tex|wash)\."
    r"|(?<!\.)[A-Za-z]\.(?![A-Za-z])"
)

LETTER = "[A-Za-zÀ-ÖØ-öø-ȳ]"
THING = "[A-Za-zÀ-ÖØ-öø-ȳ0-9]+(?:-[A-Za-zÀ-ÖØ-öø-ȳ0-9]+)*"  # cafe, 20, family-friendly, 18th
NAME = rf"[A-HJ-XZ]'{LETTER}{{3,}}"  # O'Neal
GLUED = rf"{LETTER}{{2,}}\.{LETTER}{{2,}}"  # area.The
ACRONYM = r"(?:[A-Za-z]\.){2,}"
FRACTION = "[A-Za-z0-9]+(?:/[A-Za-z0-9]+){1,2}"
DECIMAL = "[0-9]+(?:[.,:][0-9]+)+"  # 10.50, 1,000, 7:30
CLITIC = "(?:n't|'(?:s|m|d|re|ve|ll))"
TAIL = r"""(?: [,)] | [:;](?![()]) | \.(?![,;:]) | \)'s\b | "(?!") | '(?!') | [!?](?![!?]) )*"""

_TOKEN = re.compile(
    rf"""(?i:can(?=not\b)) | (?<![^\W0-9_])(?:{ACRONYM} | {ABBREVIATION})(?!{LETTER}) | {GLUED}
      | [A-Za-z]*[A-MO-Za-mo-z](?=n't\b) | {CLITIC}\b | '(?:n|em)\b | {NAME} | {FRACTION} | -?{DECIMAL}
      | (?<!\S)-[0-9]+ | {THING} | \S""",
    re.VERBOSE,
)
_PLAIN = re.compile(  # all that may stand between two spaces
    rf"""["(]* (?: {THING} | {NAME} | {GLUED} | {ACRONYM} | {FRACTION} | -?{DECIMAL}(?:{LETTER}+(?!\.))?
                 | [£$] (?:{DECIMAL} | [0-9]+(?:-[£$]?[0-9]+)?) | (?:{LETTER}{{2,}} | I | [0-9]+)?{CLITIC}
                 | '(?!(?i:em|till?|cause|tis|twas))[A-Za-z]{{3,}}
                 | {LETTER}+[,;:–]{LETTER}+ | [0-9]+–[0-9]+ | {THING}--{THING} | \.{LETTER}{{2,}} )? {TAIL}
       | --? | [–&/£$+`] | \.\.\. | '(?:t|n|em) | [0-9]+- | (?!(?i:pro|anti)-){LETTER}{{2,}}-
       | -(?:{LETTER} | [0-9])+""",
    re.VERBOSE,
)
_DOUBTFUL = re.compile(
    rf"""\b(?:{UNDECIDED})
      | (?i:\b(?:gonna|gotta|lemme|gimme|wanna)\b | cannot(?:['/-]|\.\w))  # in two parts, or not
      | \b(?i:[A-Za-z]|ol|dunkin|somethin)'(?!\w)  # elided, or quoted
      | '(?:s|m|d|re|ve|ll)$                       # in three parts at the end of a file
      | [:;]['o*-]?[()DPdpO\\]                     # a face
      | [0-9]{{2}}\)?\ [0-9]{{3}} | [0-9]\ [0-9]{{1,4}}/[0-9]  # one telephone number or fraction with a space in it
      | \.\ \.\ \. | \S\.\.\. | \.\.\.\S""",
    re.VERBOSE,
)


def java_tokens(texts: list[str]) -> list[str]:
    """Each line of text in lower case as tokens parted by spaces; `OSError` or `SubprocessError` without Java."""
    command = ["java", "-cp", JAR, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    output = subprocess.run(command, input="\n".join(texts).encode(), capture_output=True, check=True).stdout
    lines = output.decode().split("\n")
    if len(lines) != len(texts):
        raise subprocess.SubprocessError(f"the tokeniser made {len(lines)} lines of {len(texts)}")
    return [_join(line.rstrip().split(" ")) for line in lines]


def python_tokens(texts: list[str]) -> list[str]:
    """The same without Java; a `ValueError` naming the first words on which the two might differ."""
    for text in texts:
        odd = [chunk for chunk in text.split(" ") if not _PLAIN.fullmatch(chunk)] + _DOUBTFUL.findall(text)
        if odd:
            raise ValueError(f"the tokeniser in Python is not sure of {odd[0]!r}")
    return [_join(RENAMED.get(token, token.lower()) for token in _TOKEN.findall(text)) for text in texts]


def _join(tokens: Iterable[str]) -> str:
    return " ".join(token for token in tokens if token not in DROPPED)
