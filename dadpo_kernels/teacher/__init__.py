"""Teacher targets: computed once, cached, and read back beside the pairs they belong to.

Only the type is imported here; `capture`, `cache` and the readers need pyarrow or transformers and are imported by
those who use them.
"""

from .targets import TeacherTargets

__all__ = ["TeacherTargets"]
