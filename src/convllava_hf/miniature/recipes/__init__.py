"""The miniature's recipes, part of the package so that `convllava quickstart` has them without a checkout."""
