//! epoll loop with many events per wait, eventfd notifier, stop from another thread
