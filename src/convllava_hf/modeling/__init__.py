"""The code that travels with every ConvLLaVA checkpoint: configuration, model, image processor and processor."""
