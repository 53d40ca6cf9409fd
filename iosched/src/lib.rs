//! Request merger for block I/O: pure logic, no I/O, no unsafe
