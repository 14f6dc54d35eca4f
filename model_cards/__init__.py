"""Templates of model cards. A package, so that an editable install finds them too."""
