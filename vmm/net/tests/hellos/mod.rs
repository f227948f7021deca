//! TLS ClientHellos: recorded ones, and a builder of others.

/// `openssl s_client -servername Example.COM -alpn h2,http/1.1` of OpenSSL 3.0.
pub const OPENSSL: &str = "\
    160301014a010001460303941badcb163cd7423c2d48077640501b291e9a6987b64c567f5b1d422fdbcbb520f49d851bfe1c\
    9367d8ed8633efa12b45a953b404da681d317e4a183e0e7ede6a003e130213031301c02cc030009fcca9cca8ccaac02bc02f\
    009ec024c028006bc023c0270067c00ac0140039c009c0130033009d009c003d003c0035002f00ff010000bf00000010000e\
    00000b4578616d706c652e434f4d000b000403000102000a00160014001d0017001e00190018010001010102010301040023\
    00000010000e000c02683208687474702f312e310016000000170000000d002a0028040305030603080708080809080a080b\
    080408050806040105010601030303010302040205020602002b0009080304030303020301002d0002010100330026002400\
    1d002089bc860d1c0eaa9b382048185f24743a30f246d08bdcb11220378db9effa8d4d";

/// `openssl s_client -noservername` of OpenSSL 3.0.
pub const OPENSSL_WITHOUT_NAME: &str = "\
    1603010124010001200303176ba3f3d4184730bdc809ca2128d178ed39dd0f0ed0bbf2a09a1ddaa6911ad8200ba2c9130031\
    c244ab4f23bbd61cbaade99db8a58bc22181f21d65b45fcf2478003e130213031301c02cc030009fcca9cca8ccaac02bc02f\
    009ec024c028006bc023c0270067c00ac0140039c009c0130033009d009c003d003c0035002f00ff01000099000b00040300\
    0102000a00160014001d0017001e0019001801000101010201030104002300000016000000170000000d002a002804030503\
    0603080708080809080a080b080408050806040105010601030303010302040205020602002b000908030403030302030100\
    2d00020101003300260024001d002048971872cb6343867f9e1391342a622002dc984b951f18c3f62093d4d18cc13d";

/// The bytes of a recorded hello.
pub fn recorded(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

/// Data after its length in two bytes.
pub fn vector(data: &[u8]) -> Vec<u8> {
    [&(data.len() as u16).to_be_bytes()[..], data].concat()
}

/// The data of a server name extension with these host names.
pub fn server_names(names: &[&[u8]]) -> Vec<u8> {
    vector(&names.iter().flat_map(|name| [&[0][..], &vector(name)].concat()).collect::<Vec<_>>())
}

/// A handshake message with these extensions, which are a type and data.
pub fn message(extensions: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let extensions: Vec<u8> =
        extensions.iter().flat_map(|(kind, data)| [&kind.to_be_bytes()[..], &vector(data)].concat()).collect();
    let body = [
        &[3, 3][..],
        &[7; 32],
        &[32],
        &[9; 32],
        &vector(&[0x5a, 0x5a, 0x13, 0x01, 0x13, 0x02, 0xc0, 0x2b]),
        &[1, 0],
        &vector(&extensions),
    ]
    .concat();
    handshake(&body)
}

/// A handshake message of the type ClientHello.
pub fn handshake(body: &[u8]) -> Vec<u8> {
    let length = (body.len() as u32).to_be_bytes();
    [&[1, length[1], length[2], length[3]], body].concat()
}

/// The message in records of at most so many bytes.
pub fn records(message: &[u8], size: usize) -> Vec<u8> {
    message.chunks(size).flat_map(|part| [&[22, 3, 1][..], &vector(part)].concat()).collect()
}

/// The extensions of a browser: GREASE at both ends, a post-quantum key share, an outer ECH, and a long session ticket.
pub fn browser(name: &[u8], ticket: usize) -> Vec<(u16, Vec<u8>)> {
    let key_share =
        [&[0x2a, 0x2a, 0, 1, 0, 0x11, 0xec][..], &vector(&[5; 1216]), &[0, 0x1d], &vector(&[6; 32])].concat();
    let ech = [&[0, 0, 1, 0, 1, 0x3c][..], &vector(&[8; 32]), &vector(&[4; 176])].concat();
    vec![
        (0x0a0a, vec![]),
        (0x0033, vector(&key_share)),
        (0x0000, server_names(&[name])),
        (0xfe0d, ech),
        (0x0010, vector(b"\x02h2\x08http/1.1")),
        (0x0023, vec![3; ticket]),
        (0x3a3a, vec![0]),
    ]
}
