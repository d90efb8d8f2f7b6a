"""What a checkpoint's files say: configs, headers, modules, manifest."""
