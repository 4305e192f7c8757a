"""The models of a trained run, measured on conversations that it was not trained on."""
