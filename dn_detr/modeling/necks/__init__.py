"""Necks: backbone features to maps of one width."""

from __future__ import annotations

from .channel_mapper import ChannelMapper as ChannelMapper
