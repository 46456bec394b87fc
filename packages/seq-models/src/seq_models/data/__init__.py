"""Data sets as the training engine takes them; all of it is generated here or stands in the interpreter's library."""

from seq_models.data.geometry import PointBatches, only_item
from seq_models.data.language import AssociativeRecall, ByteText, Needle, Passkey, SelectiveCopy
from seq_models.data.tokens import TokenText

__all__ = [
    "AssociativeRecall",
    "ByteText",
    "Needle",
    "Passkey",
    "PointBatches",
    "SelectiveCopy",
    "TokenText",
    "only_item",
]
