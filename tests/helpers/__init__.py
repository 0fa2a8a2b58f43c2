"""What several test files share; imported as `from helpers.tiny_models import make_model`."""
