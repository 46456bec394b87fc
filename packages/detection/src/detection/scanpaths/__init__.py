"""Scanpaths: in which order the objects of a shelf are looked at; networks, baselines, data, measures."""

from detection.models import SCANPATHS

list_searchers, create_searcher, searcher_card = SCANPATHS.names, SCANPATHS.create, SCANPATHS.card
