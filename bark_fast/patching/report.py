"""What `patch` did to an object, and what it left."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One part of the object: its name within it, its class, and what was done or why not."""

    name: str
    kind: str
    what: str


@dataclass(frozen=True)
class PatchReport:
    """replaced, left: parts in order. copied_bytes: weights held twice: in a dtype that
    was asked for, or in int8, to guess tokens, from the first `generate` on a CPU on.
    """

    replaced: tuple[Entry, ...]
    left: tuple[Entry, ...]
    copied_bytes: int = 0

    def __str__(self) -> str:
        """A few lines: parts of one kind and treatment together."""
        lines = []
        for title, entries in (("replaced", self.replaced), ("left", self.left)):
            groups: dict[tuple[str, str], list[str]] = {}
            for entry in entries:
                groups.setdefault((entry.kind, entry.what), []).append(entry.name)
            for (kind, what), names in groups.items():
                which = (names[0] or "itself") + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                lines.append(f"{title}: {kind} ({which}): {what}")
        copied = f"{self.copied_bytes / 1e6:.1f} MB copied" if self.copied_bytes else "shared"
        lines.append(f"weights: {copied}")
        return "\n".join(lines)
