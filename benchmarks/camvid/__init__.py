"""The CamVid study: does the loss help a network that starts from ImageNet weights? It uses the public API alone."""
