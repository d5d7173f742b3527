"""The settings of a preparation: everything that the bytes of the result depend on, and nothing else.

The manifest records them, a second run over the same folder must agree with them, and every worker receives them.
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from tandem.data_prep.clean import CleaningRules
from tandem.data_prep.records import BAD_RECORD_COUNTS

DROPPED_COUNT_NAMES = (
    "empty_documents", "filtered_documents", "undecodable_files", "other_members",
    "short_documents", "contaminated_documents", "duplicate_documents", *BAD_RECORD_COUNTS, "dangling_links",
)  # fmt: skip
"""Names of the manifest's counts of documents, files and members of tars that were left out."""

LATER_SETTINGS = {"format": None, "skip_bad_lines": False}
"""Settings that older versions did not have, with the values of a corpus that does not state them. They are recorded only
if they have another value, so that the same preparation has the same units and the same manifest in every version."""


@dataclass(frozen=True)
class PrepareSettings:
    text_field: str
    group_field: str | None
    """Field whose values are counted separately. Dots lead into nested records: meta.redpajama_set_name."""
    where: tuple[str, str] | None
    """Field and value of the documents to keep; None keeps all."""
    skip_undecodable: bool
    cleaning: CleaningRules
    deduplicate: bool
    """Whether to keep only one of several documents that are nearly equal."""
    tokens: str | None
    """Extension of the members of a tokenized webdataset corpus; None for text."""
    padding_id: int | None
    """Id that pads the samples of a tokenized corpus, and is removed."""
    tokenizer: str
    """The hash of the given tokenizer, or the vocabulary size of the tokenizer to train."""
    eos: str
    held_out: float
    """Share of documents kept for validation."""
    seed: int
    sample_tokens: int
    shard_tokens: int
    format: str | None = None
    """The given format of all files; None decides by content."""
    skip_bad_lines: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as values that survive a round trip through JSON."""
        rules = self.cleaning
        keys = b"".join(sorted(rules.contaminant_keys))
        contaminants = hashlib.sha256(keys).hexdigest() if keys else None
        values = asdict(self)
        for name, default in LATER_SETTINGS.items():
            if values[name] == default:
                del values[name]
        return values | {
            "where": self.where and "=".join(self.where),
            "cleaning": {"nfc": rules.nfc, "min_characters": rules.min_characters, "contaminants_sha256": contaminants},
        }
