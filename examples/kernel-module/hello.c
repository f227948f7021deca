/* The smallest module there is: says that it came and that it went. */
#include <linux/init.h>
#include <linux/module.h>

static int __init hello_init(void)
{
	pr_info("hello: loaded\n");
	return 0;
}

static void __exit hello_exit(void)
{
	pr_info("hello: gone\n");
}

module_init(hello_init);
module_exit(hello_exit);
MODULE_DESCRIPTION("An example");
MODULE_LICENSE("GPL");
