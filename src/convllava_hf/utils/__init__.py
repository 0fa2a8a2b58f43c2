"""Helpers that know nothing of models: files, texts, logging, signals. Importing them loads nothing heavy,
except `device_memory`, which imports torch."""
