// Writes a clip's bytes to standard output, past FUSE where that is proven, and
// says on standard error which way they came.
//
//	go build -o read read.go
//	./read /rclone-mount/clip.y4m | sha256sum
package main

/*
#cgo pkg-config: vmafx_bypass
#include <stdlib.h>
#include <vmafx_bypass.h>
*/
import "C"

import (
	"fmt"
	"io"
	"os"
	"unsafe"
)

// Clip is a clip that is open: an io.ReaderAt for any number of goroutines, and
// an io.Closer for when all of them are done.
type Clip struct {
	path   string
	handle *C.vmafx_file
}

// Open opens a clip.
func Open(path string) (*Clip, error) {
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	// cgo's second result is errno, of the same thread. vmafx_last_error() may
	// be of another by then, unless runtime.LockOSThread() was called.
	handle, err := C.vmafx_open(name, 0)
	if handle == nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return &Clip{path, handle}, nil
}

// ReadAt reads as io.ReaderAt says.
func (c *Clip) ReadAt(buffer []byte, offset int64) (int, error) {
	if len(buffer) == 0 {
		return 0, nil
	}
	n, err := C.vmafx_pread(c.handle, unsafe.Pointer(&buffer[0]), C.size_t(len(buffer)), C.int64_t(offset))
	switch {
	case n < 0:
		return 0, &os.PathError{Op: "read", Path: c.path, Err: err}
	case int(n) < len(buffer):
		return int(n), io.EOF
	}
	return int(n), nil
}

// Size is the clip's, as FUSE shows it now.
func (c *Clip) Size() (int64, error) {
	size, err := C.vmafx_size(c.handle)
	if size < 0 {
		return 0, &os.PathError{Op: "stat", Path: c.path, Err: err}
	}
	return int64(size), nil
}

// State is "active", or why the clip is read through FUSE.
func (c *Clip) State() string {
	return C.GoString(C.vmafx_state(c.handle))
}

// Stats tells how many bytes came from the cache, and how many through FUSE.
func (c *Clip) Stats() (cache, fuse uint64) {
	var counts C.vmafx_counts
	C.vmafx_stats(c.handle, &counts, C.size_t(unsafe.Sizeof(counts)))
	return uint64(counts.cache_bytes), uint64(counts.fuse_bytes)
}

// Close closes the clip.
func (c *Clip) Close() error {
	C.vmafx_close(c.handle)
	c.handle = nil
	return nil
}

func write(path string) error {
	clip, err := Open(path)
	if err != nil {
		return err
	}
	defer clip.Close()
	size, err := clip.Size()
	if err != nil {
		return err
	}
	block := make([]byte, 1<<20)
	if _, err := io.CopyBuffer(os.Stdout, io.NewSectionReader(clip, 0, size), block); err != nil {
		return err
	}
	cache, fuse := clip.Stats()
	fmt.Fprintf(os.Stderr, "%s: %d bytes from the cache, %d through FUSE\n", clip.State(), cache, fuse)
	return nil
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: read CLIP")
		os.Exit(2)
	}
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
