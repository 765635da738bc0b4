"""Memory in pages of 2 MiB, where Linux gives them to who asks.

On a CPU a step takes the memory it works in anew each time; to be given it in pages of 4 KiB takes longer than norms,
and to read it is slower.  glibc asks for large ones, from 2.35 on, but only if it is told so when a process starts.
"""

import os
import sys
from pathlib import Path

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def environment(setting: Path = SETTING) -> dict[str, str]:
    """What a process has to find in its environment; nothing where it says so already, or would make no difference."""
    given = os.environ.get(VARIABLE, "")
    if TUNABLE in given or not setting.exists() or "[madvise]" not in setting.read_text():
        return {}
    return {VARIABLE: ":".join(filter(None, (given, f"{TUNABLE}=1")))}


def restart(setting: Path = SETTING) -> None:
    """Starts this process again as it was started, with that environment; returns where that is not needed."""
    wanted = environment(setting)
    if wanted:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)
