"""The 27 words of the digits world; a token is a word."""

from collections.abc import Iterable

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PAD, BOS, EOS, IMAGE = range(4)
_WORDS = ("<pad>", "<bos>", "<eos>", "<image>", *DIGITS, "yes", "no", "in", "the", "image", "is", "there", "a",
          "describe", ".", "contains", ",", "and")  # fmt: skip


class Words:
    """Text ↔ token numbers of the digits world; the tokens of an image stand behind ``<bos>``.

    Args:
        image_tokens: how many tokens an image takes.
    """

    def __init__(self, image_tokens: int = 16) -> None:
        self.image_tokens = image_tokens
        self.number = {word: number for number, word in enumerate(_WORDS)}

    def __len__(self) -> int:
        return len(_WORDS)

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text without the image.

        Raises:
            ValueError: a word that the digits world does not know.
        """
        words = text.lower().replace(".", " . ").replace(",", " , ").replace("?", " ").split()
        unknown = [word for word in words if word not in self.number]
        if unknown:
            known = ", ".join(_WORDS[4:])
            raise ValueError(f"Words.encode: the digits world does not know {unknown[0]!r}; its words are {known}")
        return [self.number[word] for word in words]

    def prompt(self, text: str) -> list[int]:
        """``<bos>``, the image, the text."""
        return [BOS, *[IMAGE] * self.image_tokens, *self.encode(text)]

    def decode(self, tokens: Iterable[int]) -> str:
        """Words up to ``<eos>``, without padding."""
        words = []
        for token in tokens:
            if token == EOS:
                break
            if token not in (PAD, BOS, IMAGE):
                words.append(_WORDS[token])
        return " ".join(words)
