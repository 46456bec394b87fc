"""A model with what turns a picture and a text into its inputs: a trained run, a folder, or a name on the hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from attn_core import pictures
from vlm_tools.data.words import Words
from vlm_tools.intervention.adapters import ADAPTERS, adapter_of


def read_picture(path: Path) -> Image.Image:
    """A picture file as RGB, upright.

    Raises:
        ValueError: missing, no picture, a broken one, or levels without black and white; the message names the file.
    """
    return Image.fromarray(pictures.read_picture(path).rgb())


@dataclass
class Session:
    """A model ready for questions.

    Attributes:
        model: in eval mode.
        processor: its processor; None for the digits world.
    """

    model: Any
    processor: Any | None

    def prepare(self, picture: Image.Image, prompt: str) -> dict[str, Any]:
        """Inputs of one picture and one prompt.

        Raises:
            ValueError: empty prompt, a processor that forgets the image; in the digits world, words that it does not
                know.
        """
        if not prompt.strip():
            raise ValueError("the prompt is empty; ask something")
        if self.processor is None:
            ids = torch.tensor([Words().prompt(prompt)])
            side = self.model.config.vision_config.image_size
            gray = picture.convert("L")
            gray = gray if gray.size == (side, side) else gray.resize((side, side), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.asarray(gray, dtype=np.float32) / 255)[None, None]
            return self._moved({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
        turn = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]}]
        if getattr(self.processor, "chat_template", None):
            inputs = self.processor.apply_chat_template(
                turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        else:
            token = getattr(self.processor, "image_token", None)
            adds_itself = self.model.config.model_type == "paligemma"
            text = prompt if token is None or adds_itself or token in prompt else f"{token}\n{prompt}"
            inputs = self.processor(images=picture, text=text, return_tensors="pt")
        number = adapter_of(self.model).image_token_id(self.model.config)
        if not bool((inputs["input_ids"] == number).any()):
            raise ValueError(f"the processor of the model puts no image token (id {number}) into the prompt; "
                             "give it a chat template or the model's own processor")  # fmt: skip
        return self._moved(dict(inputs))

    def answer(self, inputs: Mapping[str, Any], tokens: int) -> Int[Tensor, "1 A"]:
        """Greedy answer without the prompt."""
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        answer = out[:, inputs["input_ids"].shape[1] :]
        if self.processor is None and Words().decode(answer[0, :1].tolist()) in ("yes", "no"):
            return answer[:, :1]  # questions were trained without an end
        return answer

    def words(self, tokens: Sequence[int]) -> list[str]:
        """Text of each token."""
        if self.processor is None:
            return [Words().decode([token]) for token in tokens]
        return [self.processor.tokenizer.decode([token]) for token in tokens]

    def text(self, tokens: Sequence[int]) -> str:
        """Text of an answer."""
        if self.processor is None:
            return Words().decode(tokens)
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text alone.

        Raises:
            ValueError: the text has none; in the digits world, a word that it does not know.
        """
        if self.processor is None:
            tokens = Words().encode(text)
        else:
            tokens = self.processor.tokenizer.encode(text, add_special_tokens=False)
        if not tokens:
            raise ValueError(f"the phrase is empty, got {text!r}; name what to look for")
        return tokens

    def boxes(self, inputs: Mapping[str, Any], size: tuple[int, int]) -> Float[Tensor, "T 4"]:
        """Rectangle of each image token; ``size`` is the picture's height and width."""
        adapter = adapter_of(self.model)
        visual = inputs["input_ids"][0] == adapter.image_token_id(self.model.config)
        return adapter.boxes(self.model.config, inputs, visual, size)

    def _moved(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else value.dtype)
            if torch.is_tensor(value)
            else value
            for name, value in inputs.items()
        }


def open_session(model: str | None, *, device: str = "auto") -> Session:
    """A model by run directory, folder, or name; None is the newest run of the digits world.

    Raises:
        ValueError: a model of a type without adapter, or files that transformers cannot read; EngineError: no run.
    """
    from attn_core.engine.distributed import choose_device
    from attn_core.engine.run import open_run
    from vlm_tools.package import PACKAGE

    if model is None or (Path(model) / "config.py").is_file():
        run = open_run(PACKAGE, model, device=device)
        if not hasattr(run.model.net, "get_decoder"):
            raise ValueError(f"--model {run.directory}: a run of {type(run.model.net).__name__}, which no one can ask; "
                             "use a run of llava_digits, or vlm-tools predict")  # fmt: skip
        return Session(run.model.net.eval(), None)  # pyright: ignore[reportAttributeAccessIssue]
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    try:
        kind = AutoConfig.from_pretrained(model).model_type
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_unreadable(model, error)) from None
    if kind not in ADAPTERS:
        raise ValueError(f"--model {model}: there is no adapter for model type {kind!r}, only for "
                         f"{', '.join(sorted(ADAPTERS))}")  # fmt: skip
    disable_progress_bar()
    try:
        network: Any = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
        processor = AutoProcessor.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_unreadable(model, error)) from None
    return Session(network.to(choose_device(device)).eval(), processor)


def _unreadable(model: str, error: Exception) -> str:
    reason = str(error).strip().split("\n", 1)[0][:200]
    return f"--model {model}: transformers cannot open it ({reason})"
