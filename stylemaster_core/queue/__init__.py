"""Batches of videos, styles and prompts, run by one or more ComfyUI servers."""
