"""The paper in miniature: a world of colored shapes and signs, and a ConvLLaVA trained in it from nothing."""
