"""What a preparation was asked for: everything the bytes of its result depend on, and nothing else.

`PrepareSettings` is what a corpus says it was made with, what a second run over the same folder must agree with, and what
travels to every worker on every machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from tandem.data_prep.clean import CleaningRules


@dataclass(frozen=True)
class PrepareSettings:
    text_field: str
    group_field: str | None
    """Field whose values are counted apart, dotted: meta.redpajama_set_name."""
    where: tuple[str, str] | None
    """Field and value of the documents to keep; None keeps all."""
    skip_undecodable: bool
    cleaning: CleaningRules
    deduplicate: bool
    """Whether one of documents that are nearly the same is kept."""
    tokenizer: str
    """The hash of the given tokenizer, or the size of the one to be trained."""
    eos: str
    held_out: float
    """Share of documents kept for validation."""
    seed: int
    sample_tokens: int
    shard_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The settings as values that JSON gives back unchanged."""
        values = asdict(self)
        rules = self.cleaning
        contaminants = (
            hashlib.sha256(b"".join(sorted(rules.contaminant_keys))).hexdigest() if rules.contaminant_keys else None
        )
        return values | {
            "where": self.where and "=".join(self.where),
            "cleaning": {"nfc": rules.nfc, "min_characters": rules.min_characters, "contaminants_sha256": contaminants},
        }
