"""The ways by which torch_npu asks the device for work: aclnn, aclop, ATB, and none of them."""
