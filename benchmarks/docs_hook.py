"""MkDocs hook: the benchmark report and the plots in it are part of the site, where the repository has them."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    report = HERE / "REPORT.md"
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", report.read_text())
    for path in [report, *(HERE / image for image in images)]:
        files.append(File.generated(config, path.relative_to(HERE.parent).as_posix(), abs_src_path=str(path)))
    return files
