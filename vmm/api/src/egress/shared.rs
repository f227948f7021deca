//! Rules that allow more than they seem to: names below which any customer of a provider can publish, and the address at
//! which clouds keep credentials.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Ports, Target};

/// Names below which unrelated customers have names of their own.
const SHARED: [&str; 57] = [
    "akamaihd.net",
    "akamaized.net",
    "appspot.com",
    "azureedge.net",
    "azurefd.net",
    "azurestaticapps.net",
    "azurewebsites.net",
    "b-cdn.net",
    "backblazeb2.com",
    "blogspot.com",
    "cloudapp.azure.com",
    "cloudapp.net",
    "cloudfront.net",
    "co.jp",
    "co.uk",
    "codeberg.page",
    "com.au",
    "com.br",
    "deno.dev",
    "digitaloceanspaces.com",
    "edgekey.net",
    "edgesuite.net",
    "fastly.net",
    "fastlylb.net",
    "firebaseapp.com",
    "firebaseio.com",
    "fly.dev",
    "github.io",
    "githubusercontent.com",
    "gitlab.io",
    "glitch.me",
    "googleapis.com",
    "googleusercontent.com",
    "herokuapp.com",
    "hf.space",
    "myshopify.com",
    "netlify.app",
    "ngrok-free.app",
    "ngrok.app",
    "ngrok.io",
    "ondigitalocean.app",
    "onrender.com",
    "oraclecloud.com",
    "pages.dev",
    "r2.cloudflarestorage.com",
    "r2.dev",
    "railway.app",
    "readthedocs.io",
    "replit.dev",
    "run.app",
    "surge.sh",
    "trycloudflare.com",
    "vercel.app",
    "web.app",
    "web.core.windows.net",
    "wordpress.com",
    "workers.dev",
];
/// Providers whose names have regions and services before the part that a customer chooses.
const PROVIDERS: [&str; 3] = ["aliyuncs.com", "amazonaws.com", "windows.net"];
/// Where clouds give a machine its credentials.
const METADATA: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254))];

/// The rest of a sentence that starts with the rule.
pub(super) fn warning_about(target: &Target, ports: &Ports) -> Option<String> {
    match target {
        Target::Subdomains(suffix) => {
            let suffix = suffix.as_str();
            let is_below = |name: &str, other: &str| name.strip_suffix(other).is_some_and(|rest| rest.ends_with('.'));
            let is_shared = SHARED.iter().any(|shared| *shared == suffix || is_below(shared, suffix))
                || PROVIDERS.iter().any(|provider| *provider == suffix || is_below(suffix, provider));
            is_shared.then(|| format!("allows names of unrelated owners: anyone can publish below {suffix}"))
        }
        Target::Network(network) => {
            let found = METADATA.iter().find(|address| network.contains(*address))?;
            Some(format!("allows {found}, where clouds keep the credentials of this host"))
        }
        Target::Host if *ports == Ports::All => Some("allows every service on the host's loopback".into()),
        Target::Host | Target::Name(_) => None,
    }
}
