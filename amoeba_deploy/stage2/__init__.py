"""Stage 2: from a model, its selection and data to a one-for-all checkpoint in which every shape is good."""
