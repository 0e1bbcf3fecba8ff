"""The losses inside other people's models and trainers."""

from .patch import SelectedLogpsOutput, patch

__all__ = ["SelectedLogpsOutput", "patch"]
