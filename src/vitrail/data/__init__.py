"""Images in: data sets, transforms, augmentation, loaders."""
