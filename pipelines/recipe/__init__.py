"""How the default models are made, from scikit-learn's digits alone: one short file a model, ``pretrain``
joins them."""
