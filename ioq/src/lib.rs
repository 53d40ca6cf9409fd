//! Asynchronous file I/O queue: Linux AIO through raw system calls, null engine
