"""The verbs below ``medical-seg slides``: whole slides as bags of features."""

from attn_core.engine import PackageId, TaskPackage
from medical_seg.commands.slides.heatmap import heatmap
from medical_seg.commands.slides.predict import predict
from medical_seg.commands.slides.summary import summary
from medical_seg.commands.slides.train import train_settings
from medical_seg.commands.train import draw_predictions
from medical_seg.package import PACKAGE

SLIDES = TaskPackage(
    package=PackageId(name=PACKAGE.name, module=PACKAGE.module, default_recipe="digit_bags"),
    summary="Whole slides as bags of features: train, predict, heat maps.",
    predict=predict,
    draw_predictions=draw_predictions,
    own_recipes={"data": "slides"},
    train_settings=train_settings,
    commands={"heatmap": heatmap, "summary": summary},
    verbs=("train", "eval", "predict"),
)
