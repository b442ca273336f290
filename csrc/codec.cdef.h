/* Declarations of frame.h and of the C library for cffi, in the subset of C that it parses. */

typedef int (*ttun_encrypt)(unsigned char *, unsigned long long *, const unsigned char *,
                            unsigned long long, const unsigned char *, unsigned long long,
                            const unsigned char *, const unsigned char *, const unsigned char *);
typedef int (*ttun_decrypt)(unsigned char *, unsigned long long *, unsigned char *,
                            const unsigned char *, unsigned long long, const unsigned char *,
                            unsigned long long, const unsigned char *, const unsigned char *);
typedef int (*ttun_expand)(unsigned char *, const unsigned char *);

struct ttun_cipher_state *ttun_cipher_new(ttun_encrypt, ttun_decrypt, ttun_expand,
                                          uint32_t tag_size, uint8_t direction, const uint8_t *key);
void ttun_cipher_wipe(struct ttun_cipher_state *);
void ttun_cipher_free(struct ttun_cipher_state *);
void *ttun_find_function(const char *library, const char *name);
size_t ttun_seal(struct ttun_cipher_state *, uint8_t *frame, const uint8_t *packet, size_t size);
ptrdiff_t ttun_open(struct ttun_cipher_state *, uint8_t *ciphertext, size_t length);

/* Requests of ioctl(2): other numbers on MIPS and PowerPC. */
#define TIOCOUTQ ...
#define TUNSETIFF ...
#define TUNGETFEATURES ...
#define TUNSETOFFLOAD ...
#define TUNSETVNETHDRSZ ...

#define PR_SET_PDEATHSIG ...
#define PR_SET_DUMPABLE ...
#define PR_CAPBSET_READ ...
#define PR_CAPBSET_DROP ...
#define PR_SET_NO_NEW_PRIVS ...
int prctl(int, unsigned long, unsigned long, unsigned long, unsigned long);
int capget(uint8_t *header, uint8_t *data);
int capset(uint8_t *header, uint8_t *data);
int getsockopt(int, int level, int option, void *value, uint32_t *size);
