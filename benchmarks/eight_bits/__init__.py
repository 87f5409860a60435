"""Eight bits: what int8 does to factors, and to the dense model beside them: bytes, accuracy, milliseconds."""
