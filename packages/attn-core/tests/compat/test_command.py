"""``python -m attn_core.compat``: what it refuses; what ``doctor`` says of repositories shaped like originals."""

from pathlib import Path

import pytest

from attn_core.compat import REPAIRS, SHIMS
from attn_core.compat.__main__ import main
from attn_core.compat.doctor import diagnose


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "name a script, -m MODULE or a program"),
        (["run", "--provide", "nosuch", "x.py"], "provide: there is no shim 'nosuch'"),
        (["run", "--legacy", "numpi", "x.py"], "legacy: there is no repair 'numpi'; choose from 'numpy'"),
        (["run", "nosuch.py"], "there is no file nosuch.py"),
        (["run", "nosuchprogram"], "there is neither a file nor a program nosuchprogram"),
        (["doctor", "/nosuch"], "there is no folder /nosuch"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_list_names_every_shim_and_repair(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in (*SHIMS, *REPAIRS))


REPOSITORIES = {
    "nat": (
        "import natten\nfrom natten import NeighborhoodAttention2D\n"
        "o = {'rel_pos_bias': True} if hasattr(natten, 'context') else {'bias': True}\n"
        "NeighborhoodAttention2D(8, **o)\n",
        {"natten@0.14"},
        set(),
        set(),
    ),
    "hugging_face_dinat": ("from natten.functional import natten2dav, natten2dqkrpb\n", {"natten@0.14"}, set(), set()),
    "agileformer": ("from natten.functional import na2d_qk_with_bias, na2d_av\n", {"natten@0.15"}, set(), set()),
    "segman": ("import natten\nnatten.use_fused_na(True)\nnatten.functional.na2d_qk\n", {"natten@0.17"}, set(), set()),
    "recent": (
        "from natten import NeighborhoodAttention2D as NA\nNA(embed_dim=8, num_heads=2, kernel_size=3, stride=2)\n",
        {"natten@0.20"},
        set(),
        set(),
    ),
    "deformable_detr": (
        "import MultiScaleDeformableAttention as MSDA\nimport torchvision\n"
        "if float(torchvision.__version__[:3]) < 0.5:\n    from torchvision.ops.misc import _NewEmptyTensorOp\n",
        {"msda"},
        {"torchvision"},
        set(),
    ),
    "grounding_dino": ("try:\n    from groundingdino import _C\nexcept: pass\n", {"msda"}, set(), set()),
    "dfa3d": (
        "from .. import ext_loader\ne = ext_loader.load_ext('_ext', ['wms_deform_attn_forward'])\n",
        {"msda"},
        set(),
        set(),
    ),
    "bevformer": (
        "from mmcv.runner import force_fp32\nfrom mmcv.utils import ext_loader\n"
        "ext_module = ext_loader.load_ext('_ext', ['ms_deform_attn_forward'])\n",
        {"mmcv_ext"},
        set(),
        {"mmcv.runner"},
    ),
    "vim": (
        "import selective_scan_cuda\nimport causal_conv1d_cuda\n"
        "from transformers.generation import GreedySearchDecoderOnlyOutput\n",
        {"mamba"},
        {"transformers"},
        set(),
    ),
    "vmamba": (
        "import torch\nimport selective_scan_cuda_oflex\nwith torch.cuda.device(0): pass\n",
        {"mamba"},
        {"torch.cuda.device"},
        set(),
    ),
    "moh": (
        "import pkg_resources\nimport swattention\nmodel.cuda()\n",
        {"swattention"},
        {"pkg_resources", "cuda()"},
        set(),
    ),
    "mpt": (
        "from flash_attn import bert_padding, flash_attn_interface as f\nf.flash_attn_unpadded_qkvpacked_func\n",
        {"flash_attn@2.6"},
        set(),
        set(),
    ),
    "old_numpy": (
        "import numpy as np\nfrom torch._six import inf\nx = np.float(1)\n",
        set(),
        {"numpy", "torch._six"},
        set(),
    ),
    "plain": ("import numpy as np\nimport torch\nx = np.float32(1)\n", set(), set(), set()),
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_doctor_names_the_shims_and_repairs_of_a_repository(name: str, tmp_path: Path) -> None:
    source, shims, repairs, beyond = REPOSITORIES[name]
    (tmp_path / "models").mkdir()
    (tmp_path / "models/model.py").write_text(source, encoding="utf-8")
    found = diagnose(tmp_path)
    assert (set(found.shims), set(found.repairs), set(found.beyond)) == (shims, repairs, beyond)
    assert all(name in found.text() for name in (*shims, *repairs, *beyond))
    assert all("models/model.py:" in where for where in (*found.shims.values(), *found.repairs.values()))


def test_doctor_reads_the_pinned_version_of_natten(tmp_path: Path) -> None:
    (tmp_path / "dinat.py").write_text("from natten import NeighborhoodAttention2D\n", encoding="utf-8")
    (tmp_path / "requirements.txt").write_text("natten==0.17.3+torch250\n", encoding="utf-8")
    assert set(diagnose(tmp_path).shims) == {"natten@0.17"}


def test_doctor_lists_files_that_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text("print 'two'\n", encoding="utf-8")
    found = diagnose(tmp_path)
    assert found.unread == ["old.py"]
    assert "needs neither" in found.text()
