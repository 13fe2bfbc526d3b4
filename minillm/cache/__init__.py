"""Key/value stores: where the tokens that a model has already read are kept."""
