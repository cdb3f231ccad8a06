"""How a model comes here: the hub, verified downloads that resume, conversion during the download."""
