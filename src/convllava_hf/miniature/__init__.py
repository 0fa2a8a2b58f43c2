"""The paper in miniature: a world of coloured shapes and signs, and a ConvLLaVA trained in it from nothing."""
