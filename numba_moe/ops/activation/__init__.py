"""What experts do between their two matrices: kernels, plans and the public function."""
