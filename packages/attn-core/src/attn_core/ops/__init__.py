"""The operators, one folder each: the public function, and a file for every backend."""
