"""``vlm-tools export``: the questions about all ten digits as one graph; sentence blocks as they are."""

import torch
from torch import Tensor, nn

from attn_core.engine import ExportTarget, TrainedRun
from vlm_tools.models import create_model


class _Answer(nn.Module):
    """(image) → logits of yes and no for each of the ten digits, as one graph without a cache."""

    prompts: Tensor

    def __init__(self, net: nn.Module) -> None:
        from vlm_tools.data.digits_world import IMAGE_TOKENS
        from vlm_tools.data.words import DIGITS, Words

        super().__init__()
        self.net = net
        self.image_tokens = IMAGE_TOKENS
        words = Words(IMAGE_TOKENS)
        prompts = [words.prompt(f"in the image is there a {name}") for name in DIGITS]
        self.register_buffer("prompts", torch.tensor(prompts), persistent=False)
        self.answers = [words.number["yes"], words.number["no"]]

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, 36, 36) → (B, 10, 2)."""
        model: nn.Module = self.net.model  # pyright: ignore[reportAssignmentType]
        features = model.vision_tower(image).last_hidden_state[:, 1:]  # pyright: ignore[reportCallIssue]
        seen = model.multi_modal_projector(features).repeat_interleave(len(self.prompts), 0)  # pyright: ignore[reportCallIssue]
        words = model.get_input_embeddings()(self.prompts).repeat(image.shape[0], 1, 1)  # pyright: ignore[reportCallIssue]
        embeds = torch.cat([words[:, :1], seen, words[:, 1 + self.image_tokens :]], dim=1)
        hidden = model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state  # pyright: ignore[reportCallIssue]
        logits = self.net.lm_head(hidden[:, -1])[:, self.answers]  # pyright: ignore[reportCallIssue]
        return logits.reshape(image.shape[0], len(self.prompts), 2)


def export_target(run: TrainedRun | str) -> ExportTarget:
    """The questions about all ten digits as one graph; of sentence blocks (image, text) → logits.

    Raises:
        ValueError: a name other than the digits-world LLaVA's: methods and Hugging Face models are not exported.
    """
    from vlm_tools.data.digits_world import SIZE
    from vlm_tools.models.sentence_blocks import SentenceBlocks

    if isinstance(run, str):
        if run != "digits_world_llava":
            raise ValueError(f"export: {run!r} is no trained network of this package; export a run of llava_digits")
        torch.manual_seed(0)
        return ExportTarget(_Answer(create_model(run)).eval(), (torch.rand(2, 1, SIZE, SIZE),), run)
    net: nn.Module = run.model.net  # pyright: ignore[reportAssignmentType, reportAttributeAccessIssue]
    if isinstance(net, SentenceBlocks):
        inputs = (torch.rand(2, 3, SIZE, SIZE), torch.rand(2, net.text_dim))
        return ExportTarget(net.eval(), inputs, run.directory.name)
    return ExportTarget(_Answer(net).eval(), (torch.rand(2, 1, SIZE, SIZE),), run.directory.name)
