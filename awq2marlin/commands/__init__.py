"""The verbs: one public function a file."""
