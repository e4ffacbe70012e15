"""Virtual environments that see this one's packages and have a few of their own: other frameworks beside transformers 5."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.common.records import ROOT

# LangSpace without what it requires: that would bring LangVAE, and with it transformers 4.48.
WITHOUT_REQUIREMENTS = {"langspace": ("langspace==0.3.7", "saf-nlp==0.6.1", "saf-datasets==0.7.2", "yellowbrick==1.5")}
PACKAGES = {
    "langspace": ("gensim>=4.3.3", "spacy>=3.8", "gdown", "jsonlines", "pandas"),
    "pythae": ("pythae==0.1.2",),
    "frameworks": ("datasets>=4", "lightning>=2.6", "normflows==1.7.3", "nflows==0.14"),
}


class PeerMissing(RuntimeError):
    """An environment cannot be made here; the message says why."""


def peer_python(name: str) -> Path:
    """The interpreter of ``.venv-<name>``, made on first use. Raises PeerMissing."""
    folder = ROOT / f".venv-{name}"
    python, marker = folder / "bin" / "python", folder / ".ready"
    if marker.exists():
        return python
    try:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        seen = [place for place in sys.path if place.endswith("site-packages")]
        # Executed, so that what those folders point to (this package, installed in place) is found as well.
        (packages / "outer.pth").write_text("".join(f"import site; site.addsitedir({place!r})\n" for place in seen))
        install = [str(python), "-m", "pip", "install", "--quiet"]
        if name in WITHOUT_REQUIREMENTS:
            subprocess.run([*install, "--no-deps", *WITHOUT_REQUIREMENTS[name]], check=True)
        subprocess.run([*install, *PACKAGES[name]], check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        raise PeerMissing(f"{folder.name} cannot be built ({error})") from error
    marker.touch()
    return python
