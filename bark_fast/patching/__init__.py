"""Somebody else's Bark made fast in place: `patch`, `unpatch`, `patched`, `is_patched`, `patch_report`."""

from bark_fast.patching.core import is_patched, patch, patch_report, patched, unpatch
from bark_fast.patching.report import Entry, PatchReport

__all__ = ["Entry", "PatchReport", "is_patched", "patch", "patch_report", "patched", "unpatch"]
