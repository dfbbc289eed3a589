"""The parts of make_assets.py: one module for each model of the demo."""
