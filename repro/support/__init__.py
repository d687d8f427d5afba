"""What a reader of the method can skip: files, models and devices, folders of models, `base`."""
