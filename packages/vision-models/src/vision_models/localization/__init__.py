"""Weakly supervised localization: boxes of objects from labels of pictures alone; networks, losses, measures."""

from vision_models.models import LOCALIZERS

list_localizers, create_localizer, localizer_card = LOCALIZERS.names, LOCALIZERS.create, LOCALIZERS.card
