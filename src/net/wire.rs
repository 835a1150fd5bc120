//! Netlink messages as bytes: a builder, and an iterator over attributes. Layouts: `linux/netlink.h`. No I/O here.
//!
//! Attributes are kept raw rather than typed by a crate: whatever the kernel reports of a route or a rule is handed
//! back to the other kernel unchanged, also what this program has never heard of.

/// Length of `struct nlmsghdr`.
pub const HEADER: usize = 16;

/// `struct nlattr`'s flag for "contains attributes".
const NLA_F_NESTED: u16 = 0x8000;

/// One request under construction.
#[derive(Clone, Debug)]
pub struct Request {
    bytes: Vec<u8>,
    too_long: bool,
}

impl Request {
    /// A message of `kind` with `flags` (NLM_F_REQUEST is added), whose fixed part is `body`.
    pub fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | libc::NLM_F_REQUEST as u16).to_ne_bytes());
        bytes.extend_from_slice(body);
        let mut request = Self { bytes, too_long: false };
        request.pad();
        request
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }

    /// Appends an attribute.
    pub fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let len = self.length(value.len() + 4);
        self.bytes.extend_from_slice(&len);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
        self
    }

    /// Appends a u8 attribute.
    pub fn put_u8(&mut self, kind: u16, value: u8) -> &mut Self {
        self.put(kind, &[value])
    }

    /// Appends a u32 attribute in host byte order.
    pub fn put_u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_ne_bytes())
    }

    /// Appends a u32 attribute in network byte order (nfnetlink's).
    pub fn put_be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_be_bytes())
    }

    /// Appends a NUL-terminated string attribute.
    pub fn put_str(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.put(kind, &bytes)
    }

    /// Appends an attribute that contains what `fill` appends.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0, 0]);
        self.bytes.extend_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        fill(self);
        let len = self.length(self.bytes.len() - start);
        self.bytes[start..start + 2].copy_from_slice(&len);
        self
    }

    /// A length as `struct nlattr` has it.
    fn length(&mut self, len: usize) -> [u8; 2] {
        self.too_long |= len > usize::from(u16::MAX);
        (len as u16).to_ne_bytes()
    }

    /// Something in it is longer than its 16 bits of length can say: what follows would be taken for something else. Values may come
    /// from another node, so this is no bug of the caller's; [`super::socket::Netlink`] does not send it.
    pub fn is_too_long(&self) -> bool {
        self.too_long
    }

    /// Notes that a value that was put together elsewhere does not fit.
    pub fn set_too_long(&mut self) {
        self.too_long = true;
    }

    /// Appends bytes as they are (a fixed structure inside a nest).
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self.pad();
        self
    }

    /// Adds header flags.
    pub fn flag(&mut self, flags: u16) {
        let now = u16_at(&self.bytes, 6) | flags;
        self.bytes[6..8].copy_from_slice(&now.to_ne_bytes());
    }

    /// The finished message with its length and `sequence` filled in.
    pub fn finish(&self, sequence: u32) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let len = bytes.len() as u32;
        bytes[0..4].copy_from_slice(&len.to_ne_bytes());
        bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        bytes
    }
}

/// A received message: type, flags, sequence and everything after the header.
#[derive(Clone, Debug)]
pub struct Message {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub body: Vec<u8>,
}

/// Splits a datagram into its messages; what is cut off at the end is dropped.
pub fn split(mut bytes: &[u8]) -> Vec<Message> {
    let mut out = Vec::new();
    while bytes.len() >= HEADER {
        let len = u32_at(bytes, 0) as usize;
        if len < HEADER || len > bytes.len() {
            break;
        }
        out.push(Message {
            kind: u16_at(bytes, 4),
            flags: u16_at(bytes, 6),
            sequence: u32_at(bytes, 8),
            body: bytes[HEADER..len].to_vec(),
        });
        bytes = &bytes[len.next_multiple_of(4).min(bytes.len())..];
    }
    out
}

/// Iterates over the attributes in `bytes`: (kind without flags, value).
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.len() < 4 {
            return None;
        }
        let len = u16_at(rest, 0) as usize;
        if len < 4 || len > rest.len() {
            return None;
        }
        let item = (u16_at(rest, 2) & 0x3fff, &rest[4..len]);
        rest = &rest[len.next_multiple_of(4).min(rest.len())..];
        Some(item)
    })
}

/// The first attribute of `kind` in `bytes`.
pub fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(k, _)| *k == kind).map(|(_, value)| value)
}

/// A NUL-terminated string attribute.
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// A u32 attribute in host order; 0 when it is too short.
pub fn u32_of(value: &[u8]) -> u32 {
    if value.len() < 4 { 0 } else { u32_at(value, 0) }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_is_read_back() {
        let mut request = Request::new(16, 0x400, &[1, 2, 3, 4]);
        request.put_u8(1, 7).put_str(3, "eth0").nest(18, |m| {
            m.put_u32(2, 9);
        });
        let bytes = request.finish(5);
        let messages = split(&bytes);
        assert_eq!(messages.len(), 1);
        let m = &messages[0];
        assert_eq!((m.kind, m.sequence, m.flags), (16, 5, 0x401));
        let attrs = &m.body[4..];
        assert_eq!(find(attrs, 1), Some(&[7u8][..]));
        assert_eq!(text(find(attrs, 3).unwrap()), "eth0");
        assert_eq!(u32_of(find(find(attrs, 18).unwrap(), 2).unwrap()), 9);
    }

    #[test]
    fn what_is_too_long_for_an_attribute_is_noticed() {
        let with = |len: usize| {
            let mut request = Request::new(16, 0, &[]);
            request.put(1, &vec![7; len]).put_u32(2, 9);
            request
        };
        assert!(!with(0xffff - 4).is_too_long());
        assert_eq!(attributes(&split(&with(0xffff - 4).finish(1))[0].body).count(), 2);
        assert!(with(0xffff - 3).is_too_long());
        let mut nested = Request::new(16, 0, &[]);
        nested.nest(1, |m| {
            m.put(2, &[0; 40_000]).put(3, &[0; 40_000]);
        });
        assert!(nested.is_too_long());
    }

    #[test]
    fn truncated_bytes_end_the_iteration() {
        let request = Request::new(16, 0, &[]).put(1, b"abcdefgh").finish(1);
        for cut in 0..request.len() {
            assert!(split(&request[..cut]).is_empty());
            attributes(&request[..cut]).for_each(drop);
        }
        assert!(attributes(&[3, 0, 1, 0]).next().is_none(), "a length below the header's");
    }
}
