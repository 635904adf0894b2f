"""The CamVid study: arms, networks, a training, its row, the page. ``python -m benchmarks.train_camvid`` runs it."""
